"""``python -m diffsparse`` is the command ``diffsparse``."""


def _main() -> None:
    from diffsparse.search.cli import main

    main()


if __name__ == "__main__":
    _main()
