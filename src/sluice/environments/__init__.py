"""What the policy plays with."""
