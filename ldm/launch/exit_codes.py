"""Exit codes that end a sweep."""

STOP_EXIT_CODES = (85, 130, 143)  # preempted, Ctrl-C, terminated: a sweep ends instead of going on to its next job
