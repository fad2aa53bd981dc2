"""Run by test_processes.py under a real launcher."""

import sys
from pathlib import Path

from training_samples import Points, Small, settings

from quickmerge.training import train

if __name__ == "__main__":
    train(Small(dropout=0), Points(), settings(steps=20, batch=3, log_every=4), Path(sys.argv[1]))
