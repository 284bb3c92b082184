"""Runs, comparisons and reports built on auxjax: chooses data, model and method, and holds no formula."""
