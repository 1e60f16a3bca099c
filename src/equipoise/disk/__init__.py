"""What reaches the disk: files and folders that are whole or ignored. It knows no model and never unpickles."""
