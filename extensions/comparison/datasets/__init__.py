"""The paper's data set STL-10."""
