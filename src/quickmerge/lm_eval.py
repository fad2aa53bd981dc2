"""``python -m quickmerge.lm_eval`` is lm-eval's own command line, which then knows ``--model quickmerge``."""
