"""Write the page of methods to the standard output. Extensions are left out."""

from posttrain.catalogue.page import page

if __name__ == "__main__":
    print(page(), end="")
