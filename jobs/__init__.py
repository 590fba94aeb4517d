"""Entry points for `ray job submit`: parse, build, run, report."""
