"""Exit codes that end a sweep."""

STOP_EXIT_CODES = (85, 130, 143)  # preempted, Ctrl-C, terminated: the sweep ends instead of starting its next job
