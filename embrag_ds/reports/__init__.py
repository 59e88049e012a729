"""Reports of a run or of an imputed file: one HTML page each, with its charts inside."""
