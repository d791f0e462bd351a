def write_report(folder, settings, material, facts, tables):
    return folder.path / "report.html"
