"""Write the pages of methods into a folder. Installed packages are left out."""

import sys
from pathlib import Path

from posttrain.catalogue.pages import pages, stale

if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    for path in stale(folder):
        path.unlink()
    for name, text in pages().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
