"""From the models' rows to blended, scored and located rows."""
