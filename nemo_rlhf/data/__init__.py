"""Files and lists of records to tokenised prompts and texts, their order, and their padding into batches."""
