"""What teams need beside the project: searches, trials, and what they share. Nothing else imports it."""
