"""What a model is asked, so that answers can be judged: tasks made from seeds, in token ids or as text. No torch."""
