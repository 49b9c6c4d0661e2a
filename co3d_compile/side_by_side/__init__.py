"""The stream beside the sliding window, on a video: agreement, accuracy, milliseconds."""
