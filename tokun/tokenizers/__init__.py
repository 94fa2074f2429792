"""Convert pictures, texts and tags to ids of one vocabulary, and back."""
