"""What holds the text of a variant file: a plain file, gzip, bgzip, BCF, or a pipe."""
