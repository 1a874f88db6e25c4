"""`python -m bhpeft_pyro` is the program `bhpeft`."""

from .cli.app import main

if __name__ == "__main__":
    main()
