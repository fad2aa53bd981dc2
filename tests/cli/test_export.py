"""`quickmerge export`: the shipped heads as an EAGLE drafter, and what is wrong in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_samples import run
