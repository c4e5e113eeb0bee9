"""What can be deleted: each folder with its verbs, its extra and its page of documentation."""
