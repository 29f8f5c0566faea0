"""Step 4: conversations into training examples, training by TRL, and what comes out, proven."""
