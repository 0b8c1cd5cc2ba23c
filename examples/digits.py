"""The three estimators inside scikit-learn, on 1,797 handwritten digits.

1. ``GridSearchCV`` over the number of clusters: distances to the centers are features of a classifier.
   The search is supervised, since the score of k-means alone only grows with the number of clusters.
2. The index inside a classifier: its graph of neighbours feeds ``KNeighborsClassifier``.
3. Codes of 8 bytes in place of 512 as features.

    python examples/digits.py
"""

from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from skivfpq import IVFIndex, LloydKMeans, ProductQuantizer


def main():
    """Three pipelines and their accuracies on digits that they have not seen."""
    X, y = load_digits(return_X_y=True)
    X_train, X_test, y_train, y_test = train_test_split(X, y, random_state=0)

    by_distances = make_pipeline(
        LloydKMeans(random_state=0), StandardScaler(), LogisticRegression(max_iter=1000)
    )
    search = GridSearchCV(by_distances, {"lloydkmeans__n_clusters": [10, 30, 100]}, cv=3)
    search.fit(X_train, y_train)
    print(f"distances to {search.best_params_['lloydkmeans__n_clusters']} centers, logistic regression")
    print(f"    accuracy {search.score(X_test, y_test):.3f}")

    by_neighbors = make_pipeline(
        StandardScaler(), IVFIndex(random_state=0), KNeighborsClassifier(metric="precomputed")
    )
    exact = make_pipeline(StandardScaler(), KNeighborsClassifier())
    print("graph of the index, 5 neighbours vote")
    print(f"    accuracy {by_neighbors.fit(X_train, y_train).score(X_test, y_test):.3f}", end=", ")
    print(f"by exact search {exact.fit(X_train, y_train).score(X_test, y_test):.3f}")

    by_codes = make_pipeline(
        ProductQuantizer(n_subspaces=8, n_bits=6, random_state=0),
        OneHotEncoder(handle_unknown="ignore"),
        LogisticRegression(max_iter=1000),
    )
    print("8 codes of 6 bits, logistic regression")
    print(f"    accuracy {by_codes.fit(X_train, y_train).score(X_test, y_test):.3f}", end=", ")
    print(f"in cross-validation {cross_val_score(by_codes, X_train, y_train, cv=3).mean():.3f}")


if __name__ == "__main__":
    main()
