"""The page that AttentionView saves is data, which no import leads to."""

from PyInstaller.utils.hooks import collect_data_files

datas = collect_data_files("fastattn", includes=["html/*"])
