"""A finished run as pages that a person reads: scores, figures, cost, provenance, and every notebook as a chapter."""
