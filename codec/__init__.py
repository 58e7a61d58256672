"""What both halves need of the frozen codec: its verified weights, recordings as samples, samples as tokens."""
