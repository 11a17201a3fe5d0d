"""A folder of studies: its tables, what is wrong with it, its folds, its series as stacks of slices."""
