"""Is it true? Agreement with the teacher, and with what retraining without images does."""
