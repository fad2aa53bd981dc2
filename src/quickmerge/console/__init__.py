"""What the commands of all capabilities share: options, how errors are told, how answers are printed."""
