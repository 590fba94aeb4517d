"""The pipeline that offline evaluation and the endpoint share, and the request schemas."""
