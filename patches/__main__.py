"""Prints the fingerprints of the installed SGLang, to bring ``TARGETS`` up to a new release."""

from econoserve.patches import fingerprint, targets

if __name__ == "__main__":
    for module, owner, name, tested in targets():
        found = fingerprint(owner, name)
        print(f"{module}\t{owner}.{name}\t{found}\t{'ok' if found == tested else 'changed'}")
