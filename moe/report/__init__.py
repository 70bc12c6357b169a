"""What a run has shown: results.json, and a page to look at."""
