"""A folder of studies: its tables, what is wrong with it, its series as stacks of slices, its folds. Imports run in
this order: tables, series_types, parts, unsorted, competition, windows, stacks, point_rules, checks, folds, cohort."""
