"""The sequential model behind the source SASRec: its settings, its training, its numpy twin."""
