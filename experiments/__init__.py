"""Runs, comparisons and reports built on auxjax: they choose data, model and method."""
