"""What only teams need: searches, trials, and what they share. Nothing else imports it."""
