"""``python -m quickmerge`` is ``quickmerge``."""

from quickmerge.cli import main

if __name__ == "__main__":
    main()
