"""One formula per file: pure functions without state, models or names of tasks."""
