"""The interactive page of `lora-merge report`: what it says, and how it is written."""
