"""The tests, a folder for each part of the repository; README.md says what lies where."""
