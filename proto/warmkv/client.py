"""The client that users import. (Being written.)"""
