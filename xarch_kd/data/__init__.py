"""Text in, rows of tokens out: corpora, packing and the order in which a stage draws its batches."""
