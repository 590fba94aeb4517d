"""The data set: schema, readers, validation, splits, synthetic catalogue."""
