"""Where adapters come from and go to besides files: whatever a caller has, and live PEFT models."""
