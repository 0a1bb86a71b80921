"""`python -m lesa`."""

from lesa.cli import main

if __name__ == "__main__":
    main()
