"""What a response is worth: built-in and users' rewards, computed in processes that can be killed."""
