"use strict";
(function () {
  var root = document.documentElement;
  var store = { get: function () { try { return localStorage.getItem("posttrain-theme"); } catch (e) { return null; } },
                set: function (v) { try { localStorage.setItem("posttrain-theme", v); } catch (e) { /* private window */ } } };
  function show(theme) { if (theme === "dark" || theme === "light") root.dataset.theme = theme; }
  show(location.hash === "#dark" ? "dark" : location.hash === "#light" ? "light" : store.get());
  document.addEventListener("DOMContentLoaded", function () {
    var button = document.getElementById("theme");
    button.hidden = false;
    button.addEventListener("click", function () {
      var system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
      var next = (root.dataset.theme || system) === "dark" ? "light" : "dark";
      show(next); store.set(next);
    });

    var tip = document.createElement("div");
    tip.id = "tip"; tip.hidden = true; tip.setAttribute("aria-hidden", "true");
    document.body.appendChild(tip);
    function words(node) {
      for (; node && node !== document.body; node = node.parentNode) {
        if (node.dataset && node.dataset.tip) return node.dataset.tip;
        if (node.tagName && node.tagName.toLowerCase() === "svg") return "";
      }
      return "";
    }
    // The browser's own slow hints become quick ones; the drawing's own title stays for readers.
    document.querySelectorAll("svg :not(svg) > title").forEach(function (title) {
      title.parentNode.dataset.tip = title.textContent;
      title.remove();
    });
    document.querySelectorAll(".sample [title]").forEach(function (node) {
      node.dataset.tip = node.title;
      node.removeAttribute("title");
    });
    document.addEventListener("pointermove", function (event) {
      var text = words(event.target);
      tip.hidden = !text;
      if (!text) return;
      tip.textContent = text;
      var x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
      var y = event.clientY + 18;
      if (y + tip.offsetHeight > innerHeight) y = event.clientY - tip.offsetHeight - 10;
      tip.style.transform = "translate(" + Math.max(x, 8) + "px," + y + "px)";
    });

    var links = Array.prototype.slice.call(document.querySelectorAll("nav a"));
    if ("IntersectionObserver" in window) {
      var watcher = new IntersectionObserver(function (seen) {
        seen.forEach(function (entry) {
          if (!entry.isIntersecting) return;
          links.forEach(function (a) {
            if (a.hash === "#" + entry.target.id) a.setAttribute("aria-current", "true");
            else a.removeAttribute("aria-current");
          });
        });
      }, { rootMargin: "-15% 0px -75% 0px" });
      document.querySelectorAll("main section[id]").forEach(function (s) { watcher.observe(s); });
    }
  });
})();
