"""`just report`: an evaluation as one self-contained HTML page to listen to, look at and sort."""
