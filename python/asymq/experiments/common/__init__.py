"""What the experiments share: command lines, files, where results come from, text, processes."""
