"""`python -m medplib` is the same as the command `medplib`."""

from medplib.apps.cli import main

if __name__ == "__main__":
    main()
