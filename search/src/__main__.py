"""``python -m diffsparse.search`` is the command ``diffsparse``."""

from diffsparse.search.cli import main

if __name__ == "__main__":
    main()
