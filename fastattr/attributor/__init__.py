"""The thing that answers: model, index and catalogue in one folder, and how they change."""
