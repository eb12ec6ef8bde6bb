"""What each public function takes: plain data, from which its command is made, too."""
